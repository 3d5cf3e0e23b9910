"""Adversarial distillation: a student's answers, a discriminator's scores, and how each learns from the other."""
