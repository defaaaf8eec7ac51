"""The stages of unCLIP: what each learns from a batch, how it is validated, how its model is built."""
