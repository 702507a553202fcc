"""x"""

MISTAKES = ()
