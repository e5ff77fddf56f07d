"""Plans of whole calls: which calls of an image compute, made from what a model told, forward only.

`calibrate` records the model inside the user's loop, `plan_for` searches for plans of any timesteps without calling it,
`judge` runs them, and `learn_plan` does all three.
"""
