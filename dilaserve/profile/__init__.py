"""What is known of a model before it serves: seconds of a step, and steps and accuracy by threshold."""
