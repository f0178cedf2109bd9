"""What devices hold and send."""
