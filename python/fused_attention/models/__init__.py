"""The reference transformer and its uses: translation, generation, transfer learning, maps.

transformer.py has the model, attend.py its attention in three ways, generate.py generation, and
training.py training.
"""
