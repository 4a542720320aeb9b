"""Many processes: who am I (`launch`), and how the backbone is sharded over all of us (`zero3`)."""
