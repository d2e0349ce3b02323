"""Small worlds to try deltaray in: a family of tiny models, a weakened real model, the theory in closed form."""
