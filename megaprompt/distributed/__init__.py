"""Many processes: what started them (`launch`), what they tell each other (`world`), and ZeRO-3 (`zero3`)."""
