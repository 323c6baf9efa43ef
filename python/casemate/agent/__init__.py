"""The guest agent's protocol in terms of the domain: requests, storages and the OCI specification of a container."""
