"""SuperGLUE: its data, patterns and verbalizers, how its tasks are scored, and its format for submissions."""
