"""Images from registries: names, credentials, requests, downloads that can be resumed. No class here decides what is stored."""
