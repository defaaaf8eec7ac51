"""Distillation: a student that needs one to four steps learns the ends of its teacher's flow."""
