"""Sources, tokenizers, the token cache, packing, and streams that are pure functions of the step."""
