"""What an operator shows: a report for people, a dossier for auditors, and a verifier that needs neither."""
