"""What a recipe costs on devices that are not there: bytes, operations and seconds of one train step."""
