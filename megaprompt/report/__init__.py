"""Tables, charts and pages, from the files of runs."""
