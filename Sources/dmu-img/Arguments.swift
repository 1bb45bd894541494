// SPDX-License-Identifier: Apache-2.0
// What the commands of dmu-img have in common in their arguments.

import ArgumentParser
import DiskFormats
import Glibc
import ImageTool
import SystemIO

extension CompletionKind {
  /// The names of formats.
  static let formats = CompletionKind.list(FormatList.all.names)
  /// NAME=VALUE,NAME=VALUE of the format that the command line gives for the new image.
  static let formatOptions = CompletionKind.custom { words, index, _ in
    // `create -f FORMAT`, `convert -O FORMAT`; both are raw otherwise.
    let option = words.contains("convert") ? "-O" : "-f"
    let name = words.value(after: option) ?? "raw"
    guard let kind = FormatList.all.named(name) else { return [] }
    return ImageOptions.completions(
      of: words.indices.contains(index) ? words[index] : "", for: kind)
  }
  /// Sizes that are often wanted.
  static func sizes(_ sizes: String...) -> CompletionKind { .list(sizes) }
}

struct Size: ExpressibleByArgument {
  let bytes: UInt64

  init?(argument: String) {
    guard let bytes = ImageFile.bytes(argument) else { return nil }
    self.bytes = bytes
  }
}

enum OutputForm: String, ExpressibleByArgument, CaseIterable {
  case human, json
}

struct Form: ParsableArguments {
  @Option(name: .customLong("output"), help: "What to print: human or json.")
  var output = OutputForm.human
  @Flag(name: .long, help: "Print JSON.") var json = false
  var isJSON: Bool { json || output == .json }
}

struct Looking: ParsableArguments {
  @Flag(
    name: [.customShort("U"), .customLong("force-share")],
    help: "Look at an image in use; what is printed may contradict itself.")
  var evenInUse = false
}

struct Trust: ParsableArguments {
  @Flag(help: "Refuse to open any file that an image names: base, data file, extent.")
  var untrusted = false
}

struct Format: ParsableArguments {
  @Option(
    name: .customShort("f"),
    help: "The image's format; unless given, its first bytes say, and it may name no file.",
    completion: .formats)
  var format: String?
  @Option(
    name: .customLong("base-format"),
    help: "The format of the image's base, whatever the image says of it.", completion: .formats)
  var ownBaseFormat: String?
  @OptionGroup var trust: Trust
  func source(_ path: String, evenInUse: Bool = false) -> ImageSource {
    ImageSource(
      path, format: format, baseFormat: ownBaseFormat, evenInUse: evenInUse,
      untrusted: trust.untrusted)
  }
}

struct Quiet: ParsableArguments {
  @Flag(name: .shortAndLong, help: "Print nothing but errors.") var quiet = false
}
