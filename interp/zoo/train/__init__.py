"""Scripts that reproduce the trained zoo: `python -m interp.zoo.train.needle` and `.induction`."""
