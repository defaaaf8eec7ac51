"""Commands over many samples, which torchrun may start as several processes: generate --prompts, embed."""
