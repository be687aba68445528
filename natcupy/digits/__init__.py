"""nat-digits, the model inside the package: its pictures, its training, its examination.

In: a recipe. Out: a model folder. The rooms: `strokes` is how digits are written, `drawing` makes
pictures of them, `datasets` gathers what is learnt and what is held out, `training` does the rest
and `card` writes it down. Needs the extra "train" (scikit-learn and matplotlib); using the model
does not.
"""
