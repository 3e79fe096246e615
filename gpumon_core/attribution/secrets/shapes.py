"""Masks tokens that are recognized by their shape, anywhere in a text."""

from __future__ import annotations

import re

from gpumon_core.attribution.secrets.library import LIBRARY_SHAPES

# As their issuers document them: shapes that the library lacks, or has in one length only.
OWN_SHAPES = (
    # Hugging Face, OpenAI and others with its form; the name of a model has words after "sk-".
    r"(?:hf|api_org)_[A-Za-z0-9]{16,}",
    r"sk-(?:ant|or|proj|svcacct|admin|lf|None|live|test)-[\w-]{12,}",
    r"sk-(?=[A-Za-z0-9]{0,64}\d)[A-Za-z0-9]{16,}(?![\w-]{0,16}[-_][a-z])",
    r"sk-[A-Za-z0-9]{32,}",
    # GitHub, GitLab, Atlassian, Bitbucket.
    r"gh[pousr]_[A-Za-z0-9]{16,}",
    r"github_pat_[A-Za-z0-9_]{16,}",
    r"gl(?:pat|rt|rtr|dt|ft|soat|cbt|ptt|imt|agent|ffct|oas)-[A-Za-z0-9_.-]{16,}",
    r"AT(?:ATT3|CTT3|BB)[A-Za-z0-9_=-]{16,}",
    # Clouds.
    r"(?:AKIA|ASIA|ABIA|ACCA)[A-Z0-9]{12,}",
    r"ABSK[A-Za-z0-9+/=]{40,}",
    r"AIza[A-Za-z0-9_-]{30,}",
    r"GOCSPX-[A-Za-z0-9_-]{10,}",
    r"ya29\.[A-Za-z0-9_.-]{10,}",
    r"1//0[A-Za-z0-9_-]{20,}",
    r"d[oop]{1,2}[or]?_v1_[A-Za-z0-9]{16,}",
    r"dapi[0-9a-f]{32}(?:-\d)?",
    r"LTAI[A-Za-z0-9]{12,}",
    r"(?:[A-Za-z0-9_~.-]{3}7Q~|[A-Za-z0-9_~.-]{3}8Q~)[A-Za-z0-9_~.-]{31,34}",
    # Services for models.
    r"nvapi-[A-Za-z0-9_-]{16,}",
    r"gsk_[A-Za-z0-9]{16,}",
    r"xai-[A-Za-z0-9]{20,}",
    r"pplx-[A-Za-z0-9]{20,}",
    r"r8_[A-Za-z0-9]{16,}",
    r"wandb_v1_[A-Za-z0-9_]{16,}",
    r"(?:csk|fw|tvly|jina|tgp_v1|rpa|lsv2_pt|lsv2_sk|phx|sgp|ntn|figd|sbp|sb_secret|tok_live|pcsk|ctx7sk)"
    r"[-_](?=[\w-]{0,128}\d)[\w-]{20,}",
    # Registries of packages and images.
    r"npm_[A-Za-z0-9]{20,}",
    r"pypi-Ag[A-Za-z0-9_-]{12,}",
    r"dckr_(?:pat|oat)_[A-Za-z0-9_-]{16,}",
    r"oy2[a-z0-9]{43}",
    r"rubygems_[0-9a-f]{32,}",
    r"cio[A-Za-z0-9]{32}",
    # Vaults, networks, monitoring.
    r"hv[sbr]\.[A-Za-z0-9_-]{12,}",
    r"s\.[A-Za-z0-9]{24}(?![A-Za-z0-9.])",
    r"[A-Za-z0-9]{14}\.atlasv1\.[A-Za-z0-9_=-]{20,}",
    r"tskey-[a-z]{2,16}-[A-Za-z0-9-]{8,}",
    r"AGE-SECRET-KEY-(?:PQ-)?1[A-Za-z0-9]{16,}",
    r"gl(?:sa|c)_[A-Za-z0-9_=]{16,}",
    r"lin_(?:api|oauth)_[A-Za-z0-9]{16,}",
    r"dp\.(?:pt|st|ct|sa|scim|audit)\.[A-Za-z0-9_.-]{16,}",
    r"pul-[0-9a-f]{32,}",
    r"sntry[su]_[A-Za-z0-9_=+/-]{20,}",
    r"NRAK-[A-Z0-9]{20,}",
    r"PMAK-[0-9a-f-]{24,}",
    r"(?:nfp|pscale_(?:tkn|pw|oauth)|rnd|FlyV1|fo1)[_ ][A-Za-z0-9_=+/,-]{20,}",
    r"ops_eyJ[A-Za-z0-9_-]{20,}",
    r"eyJ[A-Za-z0-9_+/-]{32,}={0,2}",
    r"live_\d{6,12}_[A-Za-z0-9]{16,}",
    r"[ps]k\.eyJ[A-Za-z0-9_-]{8,1024}\.[A-Za-z0-9_-]{8,}",
    # Payments, messages, shops.
    r"[srp]k_(?:live|test)_[A-Za-z0-9]{10,}",
    r"whsec_[A-Za-z0-9+/=]{16,}",
    r"shp(?:at|ca|pa|ss)_[A-Fa-f0-9]{16,}",
    r"xox[abeoprs](?:\.xox[bp])?-[A-Za-z0-9-]{10,}",
    r"xapp-\d-[A-Za-z0-9-]{10,}",
    r"SG\.[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}",
    r"xkeysib-[A-Za-z0-9-]{20,}",
    r"key-[0-9a-f]{32}",
    r"(?:bot)?\d{8,10}:AA[A-Za-z0-9_-]{30,}",
    # JSON web tokens, signed and encrypted.
    r"eyJ[A-Za-z0-9_-]{8,2048}\.(?:eyJ)?[A-Za-z0-9_-]{8,8192}(?:\.[A-Za-z0-9_-]*){1,3}",
)
# The token of a webhook is a part of its URL.
HOOKS = re.compile(
    r"(?P<hook>(?:hooks\.slack(?:-gov)?\.com/(?:services|workflows|triggers)/"
    r"|discord(?:app)?\.com/api/(?:v\d{1,2}/)?webhooks/\d{1,24}/"
    r"|api\.telegram\.org/(?:file/)?bot"
    r"|[\w-]{1,64}\.webhook\.office\.com/webhookb2/"
    r"|outlook\.office(?:365)?\.com/webhook/"
    r"|hooks\.zapier\.com/hooks/catch/"
    r"|open\.(?:feishu\.cn|larksuite\.com)/open-apis/bot/v2/hook/"
    r"|maker\.ifttt\.com/trigger/[\w-]{1,64}/(?:json/)?with/key/"
    r"|chat\.googleapis\.com/v1/spaces/[\w-]{1,64}/messages\?key="
    r"|rtmps?://[\w.:-]{1,256}/[\w-]{1,64}/(?=[\w-]{0,64}\d)(?=[\w-]{12})"
    # Addresses of Apprise are made of tokens: https://github.com/caronc/apprise/wiki
    r"|(?<![\w.+-])(?:slack|tgram|discord|pover|msteams|workflows|gchat|pbul|ifttt|prowl|spush|pushy|pushme|join|zulip"
    r"|mmosts?|matrixs?|wxteams|webex|line|opsgenie|pagerduty|splunk|victorops|twilio|sendgrid|mailgun|sns|ses|dingtalk"
    r"|feishu|lark|wecombot|gotifys?|ntfys?|bark|barks|simplepush|notica|guilded|revolt|ryver|rocket|signals?)://"
    r"|conda\.anaconda\.org/t/|[\w.-]{1,128}/conda/t/"
    r"))(?P<value>(?!\*)[^\s\"'<>\\?/][^\s\"'<>\\?]*)",
    re.IGNORECASE,
)
# The key of Weights & Biases is an ordinary hexadecimal number; a word near it marks it.
WANDB = re.compile(
    r"(?P<before>wandb[^\n]{0,64}?(?<![0-9a-zA-Z]))(?P<value>[0-9a-f]{40})(?![0-9a-zA-Z])", re.IGNORECASE
)
SHAPES = re.compile(
    r"(?<![A-Za-z0-9])(?:"
    + "|".join([*OWN_SHAPES, *(f"(?:{shape})" for shape in LIBRARY_SHAPES)])
    + r")[A-Za-z0-9_-]*"
)


def starred(text: str, stars: str) -> str:
    """The text with every token replaced by stars."""
    if "/" in text:
        text = HOOKS.sub(rf"\g<hook>{stars}", text)
    text = SHAPES.sub(stars, text)
    if "andb" in text or "ANDB" in text:
        text = WANDB.sub(rf"\g<before>{stars}", text)
    return text
