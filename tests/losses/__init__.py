"""The losses: their numbers and gradients, missing labels, autograd, the compiler, and what forward feeds."""
