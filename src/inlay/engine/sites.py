"""Places in any model: where a piece can sit, what role the place plays, and how users name it.

CONTRACT (implemented in this file and in roles.py).
"""
