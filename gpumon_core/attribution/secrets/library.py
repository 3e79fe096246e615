"""Shapes of tokens from detect-secrets 1.5.0 (Yelp, Apache License 2.0).

Written by docs/token_shapes.py, which says what is used of it and why.
"""

LIBRARY_SHAPES = (
    # artifactory
    r"""AKC[a-zA-Z0-9]{10,}""",
    # aws
    r"""(?:A3T[A-Z0-9]|ABIA|ACCA|AKIA|ASIA)[0-9A-Z]{16}""",
    # discord
    r"""[MNO][a-zA-Z\d_-]{23,25}\.[a-zA-Z\d_-]{6}\.[a-zA-Z\d_-]{27}""",
    # github_token
    r"""(ghp|gho|ghu|ghs|ghr)_[A-Za-z0-9_]{36}""",
    # gitlab_token
    r"""(glpat|gldt|glft|glsoat|glrt)-[A-Za-z0-9_\-]{20,50}(?!\w)""",
    # gitlab_token
    r"""GR1348941[A-Za-z0-9_\-]{20,50}(?!\w)""",
    # gitlab_token
    r"""glcbt-([0-9a-fA-F]{2}_)?[A-Za-z0-9_\-]{20,50}(?!\w)""",
    # gitlab_token
    r"""glimt-[A-Za-z0-9_\-]{25}(?!\w)""",
    # gitlab_token
    r"""glptt-[A-Za-z0-9_\-]{40}(?!\w)""",
    # gitlab_token
    r"""glagent-[A-Za-z0-9_\-]{50,1024}(?!\w)""",
    # gitlab_token
    r"""gloas-[A-Za-z0-9_\-]{64}(?!\w)""",
    # mailchimp
    r"""[0-9a-z]{32}-us[0-9]{1,2}""",
    # pypi_token
    r"""pypi-AgEIcHlwaS5vcmc[A-Za-z0-9-_]{70,}""",
    # pypi_token
    r"""pypi-AgENdGVzdC5weXBpLm9yZw[A-Za-z0-9-_]{70,}""",
    # sendgrid
    r"""SG\.[a-zA-Z0-9_-]{22}\.[a-zA-Z0-9_-]{43}""",
    # slack
    r"""(?i:xox(?:a|b|p|o|s|r)-(?:\d+-)+[a-z0-9]+)""",
    # slack
    r"""(?ix:https://hooks\.slack\.com/services/T[a-zA-Z0-9_]+/B[a-zA-Z0-9_]+/[a-zA-Z0-9_]+)""",
    # square_oauth
    r"""sq0csp-[0-9A-Za-z\\\-_]{43}""",
    # stripe
    r"""(?:r|s)k_live_[0-9a-zA-Z]{24}""",
    # telegram_token
    r"""\d{8,10}:[0-9A-Za-z_-]{35}""",
    # twilio
    r"""AC[a-z0-9]{32}""",
    # twilio
    r"""SK[a-z0-9]{32}""",
)
