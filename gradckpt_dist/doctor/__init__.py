"""``gradckpt doctor``: what is installed here, and what of this package will work."""
