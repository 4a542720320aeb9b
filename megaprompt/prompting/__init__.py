"""The paper's method, sections 3.1 to 3.3: templates, the prompt encoder, packing, recipes. No cluster, no file."""
