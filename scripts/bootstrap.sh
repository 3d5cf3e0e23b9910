#!/bin/sh
# Makes a bare Debian or Ubuntu machine ready: packages, a deploy key, a repository, a virtual environment with Trainway.
# What is there stays as it is; a second run changes nothing and says so.
# Usage: sh bootstrap.sh [--repo URL [--ref REF] [--dir DIR]] [--venv DIR] [--source TREE|WHEEL|REQUIREMENT] [--data PATH]...
set -eu

repo='' ref='' dir='' venv="$HOME/trainway-venv" source='' data='' changed=0
newline='
'

fail() { # code what why fix
  printf 'error: %s\nwhy: %s\nfix: %s\n' "$2" "$3" "$4" >&2
  exit "$1"
}
say() { printf 'bootstrap: %s\n' "$1"; }

while [ $# -gt 0 ]; do
  name=$1
  case $name in
    -h | --help) sed -n '2,4s/^# //p' "$0"; exit 0 ;;
    --repo | --ref | --dir | --venv | --source | --data)
      [ $# -ge 2 ] || fail 2 "$name has no value" 'every option takes one' "e.g. $name VALUE"
      case $name in
        --repo) repo=$2 ;;
        --ref) ref=$2 ;;
        --dir) dir=$2 ;;
        --venv) venv=$2 ;;
        --source) source=$2 ;;
        --data) data="$data$2$newline" ;;
      esac
      shift 2 ;;
    *) fail 2 "unknown argument $name" 'bootstrap.sh --help shows those it knows' 'correct it' ;;
  esac
done
case $repo$ref in -*) fail 2 "$repo $ref begins with a dash" 'Git would take it for an option' 'correct it' ;; esac
case $ref in -*) fail 2 "--ref is $ref" 'Git would take it for an option' 'correct it' ;; esac
[ -n "$repo" ] || [ -z "$ref$dir" ] || fail 2 '--ref or --dir is given without --repo' 'they are about a repository' 'add --repo URL'
if [ -n "$repo" ] && [ -z "$dir" ]; then
  name=${repo%/}
  name=${name##*[/:]}
  dir=$HOME/${name%.git}
fi

as_root() {
  if [ "$(id -u)" = 0 ]; then "$@"; elif command -v sudo >/dev/null 2>&1; then sudo "$@"; else
    fail 4 'packages are missing, and this is not root' "needed: $missing" 'run it as root, or install sudo'
  fi
}

# 1) packages: only those that are missing
missing=''
need() { # package, command that shows that it is there
  command -v "$2" >/dev/null 2>&1 || missing="$missing $1"
}
need git git
need tmux tmux
need vim vim
need openssh-client ssh-keygen
need rsync rsync
need curl curl
[ -e /etc/ssl/certs/ca-certificates.crt ] || missing="$missing ca-certificates"
command -v python3 >/dev/null 2>&1 && python3 -c 'import ensurepip, venv' 2>/dev/null || missing="$missing python3-venv"
if [ -n "$missing" ]; then
  command -v apt-get >/dev/null 2>&1 || fail 4 "missing:$missing" 'there is no apt-get on this machine' 'install them by hand'
  say "installing$missing"
  as_root env DEBIAN_FRONTEND=noninteractive apt-get update -qq
  # shellcheck disable=SC2086 # a list of words
  as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing >/dev/null
  changed=1
fi
python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
  fail 4 "$(python3 --version) is too old" 'Trainway needs 3.11 or newer' 'use a newer image'

# 2) a deploy key, without which a private repository cannot be fetched
key=$HOME/.ssh/id_ed25519
made=0
if [ ! -e "$key" ]; then
  mkdir -p "$HOME/.ssh"
  chmod 700 "$HOME/.ssh"
  ssh-keygen -q -t ed25519 -N '' -C "trainway-$(uname -n)" -f "$key"
  say "made $key; give its public half to the Git host as a deploy key:"
  changed=1 made=1
else
  say 'the public half of the SSH key:'
fi
[ -e "$key.pub" ] || ssh-keygen -y -f "$key" >"$key.pub"
cat "$key.pub"

# 3) the repository
if [ -n "$repo" ]; then
  GIT_TERMINAL_PROMPT=0
  export GIT_TERMINAL_PROMPT
  if [ -d "$dir/.git" ]; then
    origin=$(git -C "$dir" remote get-url origin 2>/dev/null || true)
    [ "$origin" = "$repo" ] || fail 2 "$dir is a clone of ${origin:-nothing}" "--repo is $repo" 'choose another --dir'
    before=$(git -C "$dir" rev-parse HEAD)
    git -C "$dir" fetch -q --tags origin || fail 4 "cannot fetch $repo" 'Git says so above' 'see the key and the network'
  elif [ -e "$dir" ] && [ -n "$(ls -A "$dir" 2>/dev/null)" ]; then
    fail 2 "$dir is there and no clone" 'nothing is overwritten' 'choose another --dir, or move it away'
  else
    before=''
    git clone -q -- "$repo" "$dir" || fail 4 "cannot clone $repo" 'Git says so above' \
      "$([ $made = 1 ] && echo 'add the key above to the Git host, and run this again' || echo 'see the address, the key and the network')"
  fi
  if [ -n "$ref" ]; then
    # a branch follows its remote; a tag or a commit is what it is
    if git -C "$dir" rev-parse -q --verify "refs/remotes/origin/$ref" >/dev/null; then
      git -C "$dir" checkout -q "$ref" -- && git -C "$dir" merge -q --ff-only "origin/$ref"
    else
      git -C "$dir" -c advice.detachedHead=false checkout -q "$ref" --
    fi || fail 4 "cannot go to $ref in $dir" 'Git says so above' 'commit or undo what was changed there, or correct --ref'
  elif [ -n "$before" ]; then
    git -C "$dir" merge -q --ff-only '@{upstream}' ||
      fail 4 "$dir cannot be brought up to date" 'Git says so above' 'commit or undo what was changed there'
  fi
  after=$(git -C "$dir" rev-parse HEAD)
  if [ "$before" = "$after" ]; then say "$dir is up to date: $after"; else
    say "$dir is at $after"
    changed=1
  fi
fi

# 4) Trainway, once for each state of its source
[ -n "$source" ] || { [ -n "$repo" ] && [ -e "$dir/pyproject.toml" ] && source=$dir; } || source=trainway
if [ ! -x "$venv/bin/python" ]; then
  say "making $venv"
  # what the image has of its own, such as a PyTorch for its GPU, stays in use
  python3 -m venv --system-site-packages "$venv"
  changed=1
fi
if [ -d "$source" ] && [ -d "$source/.git" ]; then
  state=$(git -C "$source" rev-parse HEAD)$(git -C "$source" status --porcelain | cksum)
elif [ -d "$source" ]; then
  state=$(find "$source" -type f \( -name '*.py' -o -name '*.toml' \) -exec cksum {} + | sort | cksum)
elif [ -f "$source" ]; then
  state=$(cksum <"$source")
else
  state=''
fi
wanted="$source $state"
stamp=$venv/.trainway-bootstrap
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ] && [ -x "$venv/bin/trainway" ]; then
  say "$("$venv/bin/trainway" --version) is installed in $venv"
else
  say "installing $source in $venv"
  pins=''
  [ -d "$source" ] && [ -f "$source/constraints.txt" ] && pins=$source/constraints.txt
  "$venv/bin/python" -m pip install -qq --disable-pip-version-check ${pins:+-c "$pins"} -- "$source" ||
    fail 4 "cannot install $source" 'pip says so above' 'see the network, or name another --source'
  printf '%s\n' "$wanted" >"$stamp"
  changed=1
fi

# 5) the data: what is missing is named, and nothing is made in its place
absent=''
while IFS= read -r path; do
  [ -z "$path" ] || [ -e "$path" ] || absent="$absent $path"
done <<EOF
$data
EOF
[ -z "$absent" ] || fail 3 "missing:$absent" "looked for from $PWD" 'bring the files here, then run this again'

[ $changed = 1 ] || say 'everything was there: nothing was changed'
say "ready. next: $venv/bin/trainway doctor"
