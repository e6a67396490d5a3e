"""What TRL's training scripts import beside trainers: their arguments, their parser, mixtures of data sets."""
