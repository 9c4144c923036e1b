"""Values, rewriting and the choice of backend: what every attention in the library agrees on. Imports torch only."""
