"""What a training of a model takes of memory and time on devices that are not here: a model, from datasheets."""
