"""A small, really trained Diffusion Transformer on scikit-learn's digits, to try and measure laziness on."""
