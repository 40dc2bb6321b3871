"""The commands: python -m launch.{prepare,train,generate,export}."""
