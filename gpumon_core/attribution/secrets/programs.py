"""The table of programs that take secrets in ways of their own.

An option's value is one of these kinds:
  secret    all of it                        attached  a secret, in the same argument only
  userpass  ada:s3cret                       percent   ada%s3cret
  comma     ada,s3cret                       slash     ada/s3cret@database
  cert      file.pem:s3cret                  source    pass:s3cret, as openssl takes passwords
  cookie    name=value                       header    Name: value
  data      none by itself: looked through   flag      the option takes no value
  after     key:s3cret                       literal   NAME=value, each of them secret
  many      each argument up to the next option
Positional arguments are secret behind certain words: from the n-th after them on.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from gpumon_core.attribution.secrets.words import word_set

SecretKind = str


@dataclass(frozen=True, slots=True)
class Positional:
    """The positional arguments from number `begin` (to `end`) after these words are secret; with `needs`, only
    where that option is given."""

    words: tuple[str, ...]
    begin: int = 0
    end: int = 99
    kind: SecretKind = "secret"
    needs: str = ""


@dataclass(frozen=True, slots=True)
class SecretOptions:
    """How a program takes secrets. `letters` are short options (several may follow one dash), `long` are long
    options, and `takes` are letters with a value that is no secret. With `verbs`, all this is only so after a
    verb."""

    letters: Mapping[str, SecretKind] = field(default_factory=dict)
    takes: str = ""
    long: Mapping[str, SecretKind] = field(default_factory=dict)
    positional: tuple[Positional, ...] = ()
    verbs: frozenset[str] = frozenset()


def _way(
    letters: str = "", takes: str = "", long: str = "", positional: str = "", verbs: str = ""
) -> SecretOptions:
    """`letters` "u=userpass", `long` "--user=userpass", `positional` "config set>1", "auth login>0-1"."""
    return SecretOptions(
        letters=dict(_pair(part) for part in letters.split()),
        takes=takes,
        long=dict(_pair(part) for part in long.split()),
        positional=tuple(_positional(part) for part in positional.split(",") if part.strip()),
        verbs=frozenset(verbs.split()),
    )


def _pair(part: str) -> tuple[str, SecretKind]:
    name, _, kind = part.rpartition("=")
    return name, kind


def _positional(part: str) -> Positional:
    words, _, places = part.partition(">")
    places, _, needs = places.strip().partition("?")
    places, _, kind = places.partition("=")
    begin, _, end = places.partition("-")
    return Positional(tuple(words.split()), int(begin), int(end or 99), kind or "secret", needs)


# With these words, the value of a general name such as "value" is a secret.
ABOUT_SECRETS = word_set("secret secrets SecureString password passwords credential credentials keyvault")
VALUES = word_set("--value --body --data --plaintext --literal --secret-value --content -Value")
WAYS: dict[str, SecretOptions] = {}


def _add(names: str, way: SecretOptions) -> None:
    for name in names.split():
        WAYS[name] = way


# Clients of the web: curl(1), wget(1), HTTPie's and xh's documents, aria2c(1), ab(1).
_add(
    "curl curlie",
    _way(
        "u=userpass U=userpass b=cookie H=header E=cert",
        "ACcdDeFhKmoPQrtTwxXyYz",
        "--user=userpass --proxy-user=userpass --oauth2-bearer=secret --cookie=cookie"
        " --cert=cert --proxy-cert=cert"
        " --pass=secret --proxy-pass=secret --tlspassword=secret --proxy-tlspassword=secret --header=header"
        " --proxy-header=header --aws-sigv4=data --url=data --key=data --proxy-key=data"
        " --preproxy=data --proxy=data",
    ),
)
_add("wget wget2", _way("", "oaetTOwUPQlADIXRBi", "--header=header --password=secret"))
_add("http https xh xhs httpie", _way("a=userpass", "Apos", "--auth=userpass"))
_add("aria2c", _way("", "dox", "--header=header"))
_add("ab", _way("A=userpass P=userpass C=cookie H=header", "ncpTtgwxyz"))
_add("wrk wrk2 hey oha bombardier vegeta", _way("H=header a=userpass", "cdtzmTDqn"))
_add("grpcurl websocat", _way("H=header", "d", "--basic-auth=userpass"))
# Databases.
_add(
    "mysql mysqldump mysqladmin mysqlimport mysqlcheck mysqlshow mysqlslap mysqlpump"
    " mysqlbinlog mysqlsh mycli mydumper"
    " mariadb mariadb-dump mariadb-admin mariadb-check mariadb-import mariadb-backup xtrabackup myloader",
    _way("p=attached", "uhPDeSB", "--password=attached --password1=attached -p=attached"),
)
_add(
    "psql pg_dump pg_dumpall pg_restore pg_basebackup createdb dropdb createuser vacuumdb"
    " reindexdb pgbench pg_isready"
    " pgcli",
    _way("W=flag w=flag", "dhpUcfonjFtTCSvPRL", "--password=flag"),
)
_add(
    "redis-cli valkey-cli keydb-cli redis-benchmark",
    _way(
        "a=secret",
        "hpsunrid",
        "--pass=secret --tls=flag",
        "AUTH>0,auth>0,config set requirepass>0,CONFIG SET requirepass>0,config set masterauth>0,"
        "CONFIG SET masterauth>0,ACL SETUSER>1,acl setuser>1",
    ),
)
_add(
    "mongo mongosh mongodump mongorestore mongoexport mongoimport mongostat mongotop mongofiles",
    _way("p=secret", "uhdcofq", "--password=secret"),
)
_add("sqlcmd bcp osql tsql isql fisql go-sqlcmd", _way("P=secret", "USdQqiowHsthla"))
_add("snowsql", _way("", "aurdsqfo", "--private-key-passphrase=secret"))
_add("beeline", _way("p=secret", "unedfw"))
_add("cqlsh cypher-shell trino presto", _way("p=secret", "uekfd", "", ""))
_add("sqlplus sqlplus64 sqlldr rman exp imp expdp impdp sql", _way("", "", "", ">0=slash"))
_add("influx influxd", _way("t=secret p=userpass", "obn", "--token=secret"))
_add("clickhouse-client clickhouse", _way("", "hudqf", "--password=secret"))
_add("neo4j-admin", _way(positional="set-initial-password>0,dbms set-initial-password>0"))
_add("etcdctl", _way("", "", "--user=userpass --password=secret"))
_add("mc mcli", _way(positional="alias set>3,config host add>3,admin user add>2"))
_add("rabbitmqctl", _way("", "np", "", "add_user>1,change_password>1,authenticate_user>1"))
_add("rabbitmqadmin", _way("p=secret", "uHPVc"))
_add("mosquitto_pub mosquitto_sub mosquitto_rr", _way("P=secret", "uhptmfiqkVA", "--pw=secret"))
_add("ttyd gotty", _way("c=userpass", "piu", "--credential=userpass"))
_add("filebrowser", _way(positional="users add>1,users update>1"))
# Logins from a command line.
_add("sshpass", _way("p=secret", "fdeP"))
_add("htpasswd", _way("", "", "", ">2?b,>1?bn"))
_add("mosquitto_passwd", _way("", "", "", ">2?b"))
_add("useradd usermod", _way("p=secret", "cdegGkKsu", "--password=secret"))
_add("net net.exe", _way("U=percent", "SIwn", "--user=percent", "user>1,use>1"))
_add(
    "smbclient rpcclient smbcacls smbget winexe wmic smbcquotas nmblookup smbtree",
    _way("U=percent", "IWnpDcTmA", "--user=percent"),
)
_add("smbclient", _way("U=percent", "IWnpDcTmAL", "--user=percent", ">1"))
_add("wbinfo ntlm_auth", _way("a=percent", "", "--authenticate=percent --password=secret"))
_add("smbmap crackmapexec nxc netexec evil-winrm", _way("p=secret", "uHdxi"))
_add(
    "ldapsearch ldapadd ldapmodify ldapdelete ldappasswd ldapwhoami ldapcompare ldapmodrdn ldapexop",
    _way("w=secret s=data a=data", "DHbfylzSYXURohpe"),
)
_add("ldappasswd", _way("w=secret s=secret a=secret", "DHbfylzSYXURohpe"))
_add("lftp ncftp ncftpput ncftpget", _way("u=comma p=secret", "epc", "--user=comma"))
_add("ipmitool", _way("P=secret K=secret k=secret y=secret", "UHIpLfCoA"))
_add(
    "snmpget snmpwalk snmpset snmpbulkwalk snmptrap snmpgetnext snmptable snmpstatus snmpbulkget",
    _way("A=secret X=secret c=secret", "vulaxntrmM"),
)
_add("xfreerdp xfreerdp3 wlfreerdp mstsc", _way("", "", "/p=secret /pass=secret /gp=secret"))
_add("rdesktop", _way("p=secret", "udgakn"))
_add("plink pscp psftp putty", _way("", "", "-pw=secret"))
_add("wpa_passphrase", _way(positional=">1"))
_add("nmcli", _way("", "", "", "dev wifi connect>2"))
_add("psexec schtasks", _way("p=secret", "u", "-p=secret /p=secret /rp=secret"))
_add("ssh-keygen", _way("N=secret P=secret", "tbCfFmOrszVwIn"))
# Archives and keys: zip(1), 7-Zip, rar, openssl(1), keytool.
_add("zip zipcloak", _way("P=secret", "bintxZ", "--password=secret"))
_add("unzip zipinfo funzip", _way("P=secret", "dx"))
_add("7z 7za 7zz 7zr 7z.exe p7zip rar unrar", _way("", "", "-p=attached -hp=attached"))
_add(
    "openssl",
    _way(
        "",
        "",
        "-pass=source -passin=source -passout=source -k=secret -K=secret -iv=data -hmac=secret -macopt=after"
        " -password=source -srppass=secret -psk=secret -kek=secret -secret=secret -pwri_password=secret",
    ),
)
_add("qpdf", _way("", "", "--password=secret --encrypt=secret", ""))
_add("pdftotext pdfinfo pdftoppm pdfimages", _way("", "fl", "-upw=secret -opw=secret"))
_add("gpg gpg2", _way("", "ruo", "--passphrase=secret"))
_add(
    "keytool jarsigner apksigner",
    _way("", "", "-storepass=secret -keypass=secret -srcstorepass=secret -deststorepass=secret"),
)
_add("signtool", _way("", "", "/p=secret"))
# Registries of images and packages.
_CREDENTIALS = (
    "--creds=userpass --src-creds=userpass --dest-creds=userpass --src-registry-token=secret"
    " --dest-registry-token=secret"
)
_add(
    "docker podman nerdctl buildah finch docker.exe",
    _way("p=secret", "ueH", f"--password=secret --secret=data {_CREDENTIALS}", verbs="login"),
)
_add("skopeo", _way("p=secret", "u", _CREDENTIALS, verbs="login"))
_add(
    "crane regctl oras ctr apptainer singularity",
    _way("p=secret u=userpass", "", f"{_CREDENTIALS} --user=userpass", verbs="login pull push images remote"),
)
_add("helm", _way("p=secret", "unf", verbs="login"))
_add("npm pnpm yarn", _way("", "", "--otp=secret", "config set>1=named,set>1=named"))
_add("twine flit", _way("p=secret", "ur"))
_add("poetry", _way("p=secret", "uC", "", "config>1=named,config>2=basic", "publish"))
_add("pdm hatch", _way("P=secret a=secret", "ur", verbs="publish"))
_add("uv", _way("t=secret p=secret", "u", verbs="publish"))
_add("cargo", _way("", "", "", "login>0"))
_add(
    "nuget dotnet",
    _way(
        "k=secret p=secret",
        "s",
        "-ApiKey=secret -Password=secret --password=secret",
        "setApiKey>0,setapikey>0",
        "push add sources source setApiKey setapikey",
    ),
)
_add("conan", _way("p=secret", "r", "", "user>1,remote login>2", "user login"))
# Services.
_add("vllm vllm.entrypoints.openai.api_server vllm.entrypoints.api_server", _way("", "", "--api-key=many"))
_add("wandb", _way("", "", "--host=data --base-url=data --key=secret", "login>0"))
_add("hf huggingface-cli", _way("", "", "", "login>0,auth login>0"))
_add("gh glab", _way("t=secret", "h", "--token=secret", "secret set>1", "login secret auth"))
_add(
    "vault bao",
    _way(
        "",
        "",
        "-token=secret -address=data -method=data -path=data -format=data -field=data",
        "login>0=plain,unseal>0,operator unseal>0,token lookup>0,token revoke>0,token renew>0,unwrap>0,"
        "kv put>1=literal,kv patch>1=literal,write>1=literal",
    ),
)
_add("az", _way("p=secret", "ugnsot", "", "", "login sp ad credential acr"))
_add("aws awslocal", _way(positional="configure set>1=named"))
_add("doctl vercel netlify railway render", _way("t=secret", "ac", "--access-token=secret --auth=secret"))
_add("snyk", _way(positional="auth>0"))
_add("ngrok", _way("", "", "--authtoken=secret", "authtoken>0,config add-authtoken>0,config add-api-key>0"))
_add("cloudflared", _way("", "", "--token=secret", "service install>0"))
_add("bw", _way("", "", "", "login>1,unlock>0"))
_add("prefect", _way("k=secret", "w", "--key=secret", verbs="login"))
_add("kaggle", _way("v=secret", "n", verbs="set"))
_add("boinccmd", _way("", "", "--passwd=secret --project_attach=data", ">0"))
_add("squeue sacct sinfo scancel sacctmgr scontrol sreport sstat", _way("", "uApjnMSEo"))
_add("pulumi", _way("", "", "--secret=flag", "config set>1=named"))
_add("convertto-securestring", _way("", "", "-String=secret", ">0"))
_add("vastai runpodctl", _way(positional="set api-key>0"))
_add("llm", _way("", "", "--value=secret --key=secret", "keys set>1"))
_add("openai", _way("k=secret b=data", "o", "--api-key=secret"))
_add("oc", _way("p=secret t=secret", "un", "--token=secret", verbs="login"))
_add("argocd", _way("", "", "--password=secret --auth-token=secret"))
_add("kubectl", _way("", "", "--from-literal=literal --token=secret --password=secret --docker-password=secret"))
_add("rclone", _way("", "", "", "obscure>0,config create>2=pairs,config update>1=pairs,config password>1=pairs"))
_add("dvc", _way("", "", "", "remote modify>2=named,config>1=named"))
_add("git", _way("c=data C=data", "", "-c=data -C=data --config=data", "config>1=named"))
_add("modal", _way("", "", "--token-id=secret --token-secret=secret", "secret create>1=literal"))
_add("fly flyctl", _way("t=secret", "ac", "--access-token=secret", "secrets set>0=literal"))
_add("heroku", _way("", "a", "", "config:set>0=data"))
_add("databricks", _way("", "", "", "secrets put-secret>2", ""))
_add("consul nomad", _way("", "", "-token=secret -http-auth=userpass"))
_add("borg restic duplicity", _way("", "pro", "--password=secret"))
_add("kopia", _way("p=secret"))
_add("jenkins-cli jenkins", _way("", "", "-auth=userpass"))

# Programs that start the program in their next arguments, with their options that take a value: that value is not
# the program.
LAUNCHERS = word_set(
    "find fd crictl"
    " env timeout gtimeout nice renice ionice taskset sudo doas su runuser nohup stdbuf unbuffer xargs"
    " parallel srun sbatch salloc mpirun mpiexec mpiexec.hydra orterun prun numactl setsid setpriv time"
    " chroot unshare nsenter chrt flock script watch strace ltrace perf gdb valgrind catchsegv nsys ncu"
    " nvprof dlprof docker podman nerdctl apptainer singularity enroot kubectl oc lxc incus systemd-run"
    " systemd-inhibit dbus-run-session firejail bwrap fakeroot proot busybox tini dumb-init docker-init"
    " s6-setuidgid gosu su-exec exec command builtin eval then do else if while until ! ssh mosh screen"
    " tmux at batch cron daemonize supervisord chpst softlimit prlimit ulimit uv uvx pipx npx poetry pdm"
    " conda mamba micromamba pixi hatch rye accelerate torchrun deepspeed horovodrun ray sh bash dash"
    " zsh ksh ash fish csh tcsh pwsh powershell powershell.exe cmd cmd.exe wsl wsl.exe cygpath wine sg"
    " newgrp xvfb-run xvfb dtach abduco entr nodemon direnv dotenv chamber doppler aws-vault envdir"
    " envconsul python python3 pypy pypy3 node tsocks proxychains proxychains4 torsocks ts retry"
    " hyperfine caffeinate rlwrap socat ld.so"
)
PYTHON = re.compile(r"(?:python|pypy)[\d.]*(?:-\w+)?")
LAUNCHERS_TAKE = word_set(
    "-u --user -g --group -n -k -s -c -w --workdir --name --network --net -v --volume -p --publish -e"
    " --env --label -l -h --host --hostname -C --chdir -i -o -N -t -a --context --namespace --container"
    " --cpus --memory --gpus --partition -J --job-name --unit -P -f --pid --slice --uid"
    " --gid -S -L -R -D"
)
# Options of these that take no value for one launcher.
LAUNCHERS_FLAGS = {
    program: frozenset(f"-{letter}" for letter in letters)
    for program, letters in {
        "env": "i0v", "unshare": "nuipmfUCrT", "nsenter": "muinpCUT", "sudo": "nESikKsHbAPl", "doas": "ns",
        "docker": "itdP", "podman": "itdP", "nerdctl": "itdP", "kubectl": "it", "oc": "it", "time": "pv",
        "ssh": "tnNvfCAXYT4", "xargs": "0tropx", "bash": "cilesxv",
        "sh": "cilesxv", "zsh": "cilesxv", "dash": "cilesxv",
        "fish": "cil", "python": "uisSEBIO", "python3": "uisSEBIO",
        "watch": "tdegcn", "setsid": "cfw", "strace": "ftcvkCiD",
        "flock": "nsxeuo", "systemd-run": "tPdGq", "stdbuf": "",
        "timeout": "v", "cmd": "c", "su": "lmp", "wsl": "e",
        "ionice": "t", "numactl": "al", "taskset": "ap", "screen": "dmS", "parallel": "0kt",
    }.items()
}  # fmt: skip
# -u ada -p s3cret, which many programs take that are in no table.
USER_OPTIONS = word_set("-u -U --user --username --user-name --login")
PASSWORD_LETTERS = word_set("-p -P")
# Programs that read a secret from a pipe, and programs that write one into it.
READS_SECRET = re.compile(
    r"(?:^|\s)(?:--?\w*(?:password|passphrase|token|secret|key)s?-(?:stdin|fd)|--stdin|--with-token|--password-stdin"
    r"|--passphrase-fd|--pass-stdin|--pinentry-mode)\b|\bsudo\s+(?:-\w+\s+)*-\w*S|\bchpasswd\b|\bcryptsetup\b"
    r"|\bvault\s+\w+\s+-|\bsecrets?\s+(?:create|set|add|put)\b|\bkinit\b|-passin stdin|-pass stdin|\bpasswd\b"
)
WRITES_SECRET = frozenset({"echo", "printf", "print", "Write-Output"})
# After these words, an argument that is a secret name has its value in the next argument.
SETS = word_set(
    "set set-x setx setenv export config configure modify put secret secrets env -x -gx -Ux -S"
    " --set unset create config-set"
)


# Options with a name and a value as the next two arguments: papermill -p, jq --arg, --env NAME VALUE.
PAIR_OPTIONS = word_set(
    "-p --param --parameter --parameters -e --env --set --var -v --arg --build-arg --define -D -o --option"
    " --override --setting --conf --property --attr --extra --secret --input --argstr --env-var"
)


def way_of(argument: str) -> tuple[str, SecretOptions | None]:
    """The name of the program that an argument starts, and its way of taking secrets where the table has one."""
    name = re.split(r"[/\\]", argument[-256:])[-1]
    way = WAYS.get(name)
    if way is None:
        name = name.lower().removesuffix(".exe").removesuffix(".py")
        way = WAYS.get(name)
    return name, way


def is_launcher(name: str) -> bool:
    """Whether a program starts the program in its next arguments."""
    return name in LAUNCHERS or PYTHON.fullmatch(name) is not None
