"""What the user asked for: one typed object, resolved once from defaults, environment and arguments."""
