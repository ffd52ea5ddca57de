"""A Flower app that trains by a recipe and forgets; put your own model and images in the place of the recipe's."""

from fedunlearn.flower.app import recipe_images, recipe_model, recipe_rules, server_app
from fedunlearn.flower.client import client_app

# A recipe with privacy.secure = true needs secure=True here: whether a site answers in the clear is its own affair.
client = client_app(recipe_model, recipe_images, rules=recipe_rules)
server = server_app()
