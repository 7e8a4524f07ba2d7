"""Messages ⇄ token ids: template, tokenizer, prompts, and replies read while they stream."""
