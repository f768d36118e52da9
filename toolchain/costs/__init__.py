"""The cost table (`table`), policy → cost (`model`), budget → constraint encoding (`encoding`)."""
