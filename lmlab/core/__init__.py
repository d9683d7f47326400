"""What every other package speaks: types, errors, masked sums, attention masks, keys, configs as JSON."""
