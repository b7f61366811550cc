"""What a user starts and talks to: configuration, Serve application, HTTP ingress, command line, benchmark."""
