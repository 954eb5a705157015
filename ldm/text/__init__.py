"""From prompts to conditions."""
