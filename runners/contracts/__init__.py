"""The types that the HTTP worker and the ranks share: requests, results, health, errors."""
