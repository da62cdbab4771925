"""What goes over the wire: messages, signatures, addresses."""
