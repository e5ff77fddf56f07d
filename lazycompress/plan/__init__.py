"""Plans of whole calls: which calls of an image compute, made from what a model told, forward only."""
