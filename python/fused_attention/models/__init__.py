"""The reference transformer, and what it is used for: translating, generating, transfer, looking.

transformer.py is the model, attend.py its attention in three ways, generate.py what it says,
training.py how it learns.
"""
