"""Gradients, forward mode and second derivatives: autograd.Functions around the operators."""
