#!/usr/bin/env bash
# Builds a container image with docker, podman or buildah.
# Usage: bash scripts/image.sh [train|serve] [--push REGISTRY/NAME:TAG]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage() { echo "error: $1" >&2; echo "fix: bash scripts/image.sh [train|serve] [--push REGISTRY/NAME:TAG]" >&2; exit 2; }

which="train"
push=""
while [ "$#" -gt 0 ]; do
  case "$1" in
    train | serve) which="$1" ;;
    --push)
      [ "$#" -gt 1 ] || usage "--push names no image"
      push="$2"
      shift
      ;;
    *) usage "unknown argument '$1'" ;;
  esac
  shift
done
case "$push" in
  "" ) ;;
  *:latest | *[!A-Za-z0-9._/:@-]*) usage "'$push' is no image with a tag of its own" ;;
  *:*) ;;
  *) usage "'$push' has no tag" ;;
esac

engine=""
for candidate in ${TRAINWAY_IMAGE_ENGINE:-docker podman buildah}; do
  if command -v "$candidate" >/dev/null 2>&1 && "$candidate" info >/dev/null 2>&1; then
    engine="$candidate"
    break
  fi
done
if [ -z "$engine" ]; then
  echo "error: no program here builds images" >&2
  echo "why: none of docker, podman and buildah is installed, with its service running" >&2
  echo "fix: install one (Debian, Ubuntu: apt-get install podman), or start docker's service" >&2
  exit 4
fi

version="$(sed -nE 's/^__version__ = "([^"]+)"$/\1/p' src/trainway/__init__.py)"
revision="$(git rev-parse HEAD 2>/dev/null || echo unknown)"
tag="${push:-trainway-$which:$version}"
echo "image: building $tag with $engine"
"$engine" build --file "images/$which.Dockerfile" --build-arg "REVISION=$revision" --tag "$tag" .
if [ -n "$push" ]; then
  echo "image: pushing $tag"
  "$engine" push "$tag"
fi
echo "image: done: $tag"
