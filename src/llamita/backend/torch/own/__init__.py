"""A backend around modules that somebody has written in the course: their Llama, their AdamW, their classifier."""
