"""What users of a diffusers pipeline expect: its names of arguments, CPU offload, push_to_hub."""
