"""Decides which names are for secrets, and which values with such a name are none."""

from __future__ import annotations

import re
from functools import lru_cache
from itertools import pairwise

LONGEST_NAME = 128
# A longer value is never a word, a path or a type.
LONGEST_HARMLESS = 512

# The words of camelCase, snake_case, kebab-case and dotted names.
WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+")


def word_set(text: str) -> frozenset[str]:
    """The words of a text."""
    return frozenset(text.split())


# The kind of secret by the last word of a name. `is_value_harmless` says which values of a kind are no secrets.
HEADS = {
    **dict.fromkeys(
        word_set(
            "password passwords passwd passphrase passcode passkey pswd passwort psk mnemonic otp totp masterauth"
        ),
        "password",
    ),
    **dict.fromkeys(word_set("secret secrets"), "secret"),
    **dict.fromkeys(word_set("apikey apikeys authkey accesskey secretkey privatekey masterkey"), "key"),
    **dict.fromkeys(word_set("credential credentials creds cred"), "credential"),
    **dict.fromkeys(word_set("token authtoken accesstoken apitoken bearer jwt sas"), "token"),
    **dict.fromkeys(word_set("auth authorization"), "auth"),
    "pass": "pass",
    "pw": "pass",
    "pwd": "pwd",
    "pat": "pat",
    "pin": "pin",
    **dict.fromkeys(word_set("cookie cookies"), "cookie"),
    **dict.fromkeys(word_set("sig signature"), "signature"),
    **dict.fromkeys(word_set("key keys tokens userpass basicauth webhook login ngrok"), "weak"),
}
# Ends of words that are joined: PGPASSWORD, requirepass, clientsecret, nextcloudtoken.
ENDINGS = (
    ("password", "password"),
    ("passwd", "password"),
    ("passphrase", "password"),
    ("passcode", "password"),
    ("secret", "secret"),
    ("apikey", "key"),
    ("authkey", "key"),
    ("secretkey", "key"),
    ("accesskey", "key"),
    ("privatekey", "key"),
    ("masterkey", "key"),
    ("authtoken", "token"),
    ("accesstoken", "token"),
    ("apitoken", "token"),
    ("credentials", "credential"),
    ("bindpw", "pass"),
    ("rootpw", "pass"),
    ("dbpw", "pass"),
    ("userpw", "pass"),
    ("adminpw", "pass"),
    ("pwd", "pwd"),
    ("pass", "pass"),
)
NO_ENDINGS = word_set(
    "bypass compass surpass trespass encompass underpass overpass lowpass highpass bandpass allpass"
    " multipass onepass twopass singlepass askpass"
)
# A key with one of these words is always a secret; for other keys the value decides.
KEY_OF = word_set(
    "priv unlock preshared api access private secret encryption auth authentication authorization account"
    " license licence"
    " signing master service storage shared session webhook fernet jwt hmac aes ingest ingestion admin"
    " functions decryption encrypt decrypt crypto cipher subscription write wandb openai anthropic app"
    " application pre recovery unseal root sas symmetric"
)
# Keys with these words are no secrets: they name places in tables and texts.
KEY_OF_PLACES = word_set(
    "primary foreign sort partition cache idempotency group index metric monitor join public lookup"
    " dict image label input output text prompt target column dedup dedupe hot object routing row "
    " state query attention hash num max min top by order bind shard range feature loss best early param"
    " dataset data config json field context audio video mask batch reward score conversation message"
    " messages response question answer instruction chosen rejected sample id tensor params host known"
)
# With one of these words before it, the last word means something else: a switch, or a number or kind of tokens.
SWITCHES = word_set(
    "use with has have need needs require requires required enable enabled disable disabled skip ask no"
    " allow is show print prompt without ignore hide count per num max min n support supports want"
    " preserve insecure"
)
TOKENS_OF_TEXT = word_set(
    "max min num pad eos bos unk sep cls mask stop no image per special first last draft each start end"
    " think reasoning begin separator decoder forced audio video speech text newline prefix suffix"
    " middle fim eot eod mean total avg average input output prompt completion target ignore padding boi"
    " eoi single every time by next prev additional extra continuation blank space word sub tool"
)
PASSES_OF_WORK = word_set(
    "two first second single multi one low high band all forward backward by full render num max n each"
    " per shader three extra final last opt optimization compiler"
)
# "pass" with these words means a pass of work.
PASSES = word_set("first second last both forward backward analysis")
# "secret" with these words is the name of a secret that is stored elsewhere.
NAMES_OF_SECRETS = word_set("pull imagepull tls existing")
# Words that may follow without changing the meaning.
NEUTRAL_TAILS = word_set(
    "value val str string plain plaintext text raw b64 base64 hex enc encoded new old current prod"
    " production dev staging main primary secondary default confirm confirmation repeat override hash"
    " literal live x"
)
# With one of these words after it, the name is about a secret, and its value is none.
HARMLESS_TAILS = word_set(
    "file files path paths dir directory folder id ids limit limits count length len size type types"
    " name names env environ variable var vars stdin prompt cmd command helper version budget level"
    " merging merge policy policies mode method methods field fields url uri endpoint host port server"
    " service provider providers backend store ttl expiry expires expiration lifetime timeout age max"
    " min strength rotation required optional enabled disabled check manager format header headers"
    " scheme ref reference location source src mount urls realm domain scope scopes role roles app"
    " audience issuer algorithm alg alias usage rate per cost loss weight dim embedding embeddings embed"
    " pruning dropping reduction shuffle shift fd arn region engine proxy plugin class config cache ring"
    " chain space set list map stats protected reset retries attempts column regex pattern label index"
    " position positions pos mask counts classification accuracy distribution ratio latency throughput"
    " generation generator counter bucket window stream streaming parallel rank through managers options"
    " option params separator delimiter sep bits kind spec user username login date created time at by"
    " from to for only"
)
AUTH_TYPES = word_set(
    "pass none basic digest bearer ntlm negotiate kerberos krb5 gssapi gss oauth oauth2 oidc openid saml"
    " ldap ldaps pam jwt token tokens password passwd md5 scram scram-sha-1 scram-sha-256 scram-sha-512"
    " sha256 plain trust peer ident reject radius cert certificate certs tls mtls ssl anonymous anon"
    " simple key keys pubkey publickey public-key apikey api-key api_key iam sso local internal external"
    " required optional auto default any all disabled enabled google github gitlab azure azuread entra"
    " aad sas msi managed-identity device-code device_code interactive cli aws sigv4 aws-sigv4 hmac"
    " header headers cookie session form forms proxy native login xauth file files env shared secret"
    " service-account service_account serviceaccount workload-identity adc user users admin system sys"
    " unix socket sasl passive active open wpa wpa2 wpa3 psk webauthn fido2 passkey mfa totp custom"
    " nginx htpasswd munge slurm auth/munge auth/slurm auth/none firebase auth0 okta keycloak cognito"
    " supabase clerk"
)
NO_VALUES = word_set(
    "true false yes no on off none null nil undefined auto default required optional enabled disabled"
    " prompt ask stdin unset empty hidden redacted masked todo string str int bool float any"
)
REFERENCE = re.compile(
    r"\$\{?[A-Z_][A-Z0-9_]*\}?|\$\{[\w:.?+-]{1,128}\}|\$\([^)]*\)?|\$env:\w+|%[A-Z_][A-Z0-9_]*%|\{\{.*\}\}?"
    r"|\{[\w.:]{0,64}\}?|<[^<>]*>"
    r"|(?:os\.(?:environ|getenv)|getenv|getpass|process\.env|env\.|sys\.argv|args\.|opts?\.|self\.|cfg\.|config\."
    r"|settings\.|input\(|open\(|str\(|json\.|environ|ENV\[).*"
    r"|(?:env|file|fd|op|vault|secretsmanager|ssm|arn|keyring|cmd|exec|gcpkms|awskms|azurekms|hashivault|k8s):.*"
    # A format, and a call: token = get_token()
    r"|%\(?\w{0,64}\)?s"
    r"|[A-Za-z_][\w.]{0,64}\("
    # An expression for one.
    r"|\(?(?:\\[wdsSWDb]|\.[*+]|\[\^?[^\]]{0,64}\][*+{]).*"
    r"|secrets\.\w+|\$\w+\.\w+",
    re.DOTALL,
)
PLACEHOLDER = re.compile(r"\*+|x+|X{3,}|\.{3,}|•+|…|-|_+")
SPECIAL_TOKEN = re.compile(r"<.*>|\[[A-Z_]+\]|\\[nt]|<?\|.*\|>?", re.DOTALL)
PATH = re.compile(r"(?:~|\.{1,2})?/[\w.@%+~ -]*(?:/[\w.@%+~: {}$-]*)*|[A-Za-z]:[\\/].*", re.DOTALL)
FILE = re.compile(
    r"[^\s=:;&]{1,255}\.(?:pem|key|crt|cer|der|p12|pfx|jks|json|txt|ya?ml|toml|env|conf|cfg|ini|pub|asc|gpg|kdbx|cert"
    r"|keystore|netrc|secret|dat|bin|db|csv|p8|ppk|md)"
)
UUID = re.compile(r"[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
RUN = re.compile(r"[A-Za-z0-9]{12,}")
TOKEN_LETTERS = re.compile(r"[A-Za-z0-9+/=_.~!@#$%^&*:-]{12,}")


def words_of(name: str) -> list[str]:
    """The words of a name, in lower case: ["db", "password"] of "--db-password", "dbPassword", "DB_PASSWORD"."""
    return [word.lower() for word in WORDS.findall(name[-LONGEST_NAME:])]


@lru_cache(maxsize=1024)
def kind_of(name: str) -> str:
    """The kind of secret that a name is for; "" for none. With "weak" the value must look like a secret."""
    words = words_of(name)
    while len(words) > 1 and (words[-1] in NEUTRAL_TAILS or (words[-1].isdigit() and len(words[-1]) < 5)):
        words.pop()
    if not words:
        return ""
    kind = _kind_at(words, len(words) - 1)
    if kind:
        return kind
    for place in range(len(words) - 2, -1, -1):
        kind = _kind_at(words, place)
        if not kind:
            continue
        if words[-1] in HARMLESS_TAILS or words[place + 1] in HARMLESS_TAILS:
            return ""
        # PASSWORD_DB, API_KEY_OPENAI; but token-healing, key-value, pass-through.
        return kind if kind in ("password", "secret") or (kind == "key" and name.isupper()) else "weak"
    return ""


def is_secret(name: str) -> bool:
    """Whether a name is for a secret: "--hf-token", "apiKey", "DB_PASSWORD"."""
    return kind_of(name) not in ("", "weak", "signature")


def _kind_at(words: list[str], place: int) -> str:  # noqa: PLR0911 - each reason why not
    word = words[place]
    before = words[place - 1] if place else ""
    kind = HEADS.get(word, "")
    if not kind and word not in NO_ENDINGS and len(word) > 4:
        kind = next((kind for ending, kind in ENDINGS if word.endswith(ending)), "")
    if word == "phrase" and before in ("seed", "recovery", "secret", "pass"):
        return "password"
    if kind == "weak" and word in ("key", "keys"):
        if before in KEY_OF:
            kind = "key"
        elif before in KEY_OF_PLACES:
            return ""
        elif len(words) == 1:
            return "weak"
    if not kind:
        return ""
    if before in SWITCHES:
        return "weak"
    if kind == "token" and before in TOKENS_OF_TEXT:
        return "weak"
    if kind == "pass" and before in PASSES_OF_WORK:
        return ""
    if kind == "secret" and before in NAMES_OF_SECRETS:
        return ""
    return kind


def looks_random(value: str) -> bool:  # noqa: PLR0911 - a look a branch
    """Whether a value looks randomly generated."""
    if not TOKEN_LETTERS.fullmatch(value[:LONGEST_HARMLESS]):
        return False
    if value.count("/") > 1 and not re.search(r"[+=]", value):
        return False
    if re.match(r"[a-z][a-z0-9+.-]*://", value):
        return False
    for found in RUN.finditer(value):
        run = found[0]
        digits = sum(c.isdigit() for c in run)
        letters = len(run) - digits
        if digits >= 2 and letters >= 2 and _switches(run) >= 3:
            return True
        if len(run) >= 16 and run.isalpha() and _switches(run) >= 7:
            return True
        if digits >= 4 and letters >= 4 and len(run) >= 16 and re.fullmatch(r"[0-9a-f]+|[0-9A-F]+", run):
            return True
        if len(run) >= 24 and digits and letters:
            return True
    separators = sum(not c.isalnum() for c in value)
    if len(value) >= 20 and sum(c.isdigit() for c in value) >= 4 and (_switches(value) >= 8 or separators < 2):
        return bool(re.search(r"[a-z]", value) and re.search(r"[A-Z]", value))
    return False


def _switches(text: str) -> int:
    """How often a text changes between small letters, capitals and digits."""
    kinds = ["d" if c.isdigit() else "u" if c.isupper() else "l" if c.isalpha() else "-" for c in text]
    return sum(a != b for a, b in pairwise(kinds))


def is_path(value: str) -> bool:
    """Whether a value is the path of a secret rather than a secret."""
    if FILE.fullmatch(value) and not value.startswith("eyJ"):
        return True
    if value.startswith("file:") or (value.startswith("@") and is_path(value[1:])):
        return True
    if not PATH.fullmatch(value) or len(value) < 2:
        return False
    # Base64 may begin with a slash, and a path seldom looks like Base64.
    return not (len(value) >= 20 and value.count("/") < 3 and looks_random(value.lstrip("~./")))


def is_value_harmless(kind: str, value: str) -> bool:  # noqa: PLR0911, PLR0912 - a kind a branch
    """Whether a value with a name of that kind is no secret: a switch, a place, a variable, a type."""
    value = value.strip()
    if not value or PLACEHOLDER.fullmatch(value) or (len(value) < 3 and not any(c.isalnum() for c in value)):
        return True
    if len(value) > LONGEST_HARMLESS:
        return kind == "weak" and not looks_random(value)
    lower = value.lower().rstrip(".,;:!?")
    if lower in NO_VALUES or REFERENCE.fullmatch(value):
        return True
    if kind == "password":
        return False
    if value.isdigit() and len(value) < 3:
        # --pass 1, SECRET_SANTA=1
        return True
    if kind == "pass":
        return lower in PASSES or (value.count("/") > 1 and is_path(value))
    if kind == "pwd":
        return value == "/" or is_path(value)
    if kind == "pin":
        return not (value.isdigit() and len(value) > 3)
    if kind == "auth":
        return lower in AUTH_TYPES or is_path(value) or value.startswith(("http://", "https://"))
    if kind == "pat":
        return bool(re.search(r"[*?\[\]\\(){}^$|]", value)) or is_path(value)
    if kind == "token":
        return (
            is_path(value)
            or bool(SPECIAL_TOKEN.fullmatch(value))
            or bool(re.fullmatch(r"-?\d{1,4}(\.\d+)?", value))
        )
    if kind == "cookie":
        return "=" not in value and not looks_random(value)
    if kind == "weak":
        return is_path(value) or UUID.fullmatch(value) is not None or not looks_random(value)
    if kind == "signature":
        return not (looks_random(value) or re.fullmatch(r"[0-9a-fA-F]{16,}", value))
    return is_path(value) or value.startswith(("http://", "https://"))
