"""OCI containers inside virtual machines."""
