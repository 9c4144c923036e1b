"""From a recipe to trained models: recipes, single jobs, and the comparison that runs them."""

from clearhead.extras import need

need("clearhead.train", "train")
