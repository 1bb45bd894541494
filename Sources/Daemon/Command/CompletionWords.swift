// SPDX-License-Identifier: Apache-2.0
// What a shell is offered while a command is being typed: what the daemon knows of disks, and specs.
// A shell has no place for an error: where something cannot be found out, nothing is offered.

internal import LinuxBlock
internal import SystemIO
internal import WorkerLink

/// Words for a shell to complete.
package enum CompletionWords {
  /// What a word stands for.
  package enum Kind: Sendable {
    /// A domain that has a disk: number or name.
    case domain
    /// A domain, or a disk of one, as in `web:xvda`.
    case disk
    /// A named disk.
    case named
    /// A domain or disk whose attach failed.
    case failed
    /// A store that has a pending log.
    case pending
  }

  /// The words of a kind, as the daemon has them that the command line `words` names. None
  /// without a daemon, and for a user who may not ask it.
  package static func offered(_ kind: Kind, commandLine words: [String]) -> [String] {
    let client = ClientCommands(
      configurationPath: words.value(after: "-c", "--config") ?? Configuration.defaultPath,
      socket: words.value(after: "--socket"))
    return self.words(of: kind, in: client.disksForCompletion())
  }

  /// The names of disks of disks.d, of the configuration that the command line names.
  package static func namedDisks(commandLine words: [String]) -> [String] {
    ClientCommands.filedNames(words.value(after: "-c", "--config") ?? Configuration.defaultPath)
  }

  /// The names of the mapped devices. None for a user who may not ask for them.
  package static func mappedDevices() -> [String] {
    guard DeviceMapper.isAvailable else { return [] }
    do throws(DeviceMapperError) { return try TableCommand.names() } catch { return [] }
  }

  /// The words of a kind for what status shows, each once, in its order.
  static func words(of kind: Kind, in disks: [DiskStatus]) -> [String] {
    var seen: Set<String> = []
    let words = disks.flatMap { disk -> [String] in
      let domains = [disk.domainName, disk.domain.map { String($0) }].compactMap { $0 }
      let isDisk = disk.state != .pending
      switch kind {
      case .domain: return isDisk ? domains + [disk.name].compactMap { $0 } : []
      case .named: return isDisk && disk.note == nil ? [disk.name].compactMap { $0 } : []
      case .disk where isDisk, .failed where disk.state == .failed && disk.note != nil:
        return [disk.name].compactMap { $0 } + domains + domains.map { "\($0):\(disk.label)" }
      case .disk, .failed: return []
      case .pending: return isDisk ? [] : [disk.store].compactMap { $0 }
      }
    }
    // A line break would make two words of one.
    return words.filter { !$0.contains(where: \.isNewline) && seen.insert($0).inserted }
  }

  /// What `text`, a spec that may be incomplete, can go on as: a format, an option of it and the
  /// values of that, a path, or the scheme of a hook that is installed beside the configuration that
  /// the command line names.
  package static func specs(beginning text: String, commandLine words: [String]) -> [String] {
    let prefix = "dmu:"
    guard text.hasPrefix(prefix) else { return [prefix] }
    let parts = text.dropFirst(prefix.count).split(separator: ":", omittingEmptySubsequences: false)
    guard let head = parts.first, parts.count > 1 else {
      let text = String(text.dropFirst(prefix.count))
      return options(beginning: text).map { prefix + $0 }
    }
    guard parts.count <= 3, let path = parts.last else { return [] }
    let before = prefix + head + ":" + parts.dropFirst().dropLast().map { $0 + ":" }.joined()
    let file = words.value(after: "-c", "--config") ?? Configuration.defaultPath
    let schemes = schemes(of: file).filter { $0.hasPrefix(path) }.map { before + $0 }
    guard path.isEmpty || path.first == "/" else { return schemes }
    // Names that would need codes are left to who types.
    return Folder.paths(beginning: path.isEmpty ? "/" : String(path))
      .filter { !$0.contains { ":,%?&= ".contains($0) } }.map { before + $0 } + schemes
  }

  /// "lvm//" for each hook.
  private static func schemes(of configurationPath: String) -> [String] {
    do throws(IOError) {
      return try HookFolder(configurationPath: configurationPath).schemes().map { $0 + "//" }
    } catch { return [] }
  }

  /// `FORMAT?OPTION=VALUE&...`, as far as it goes.
  private static func options(beginning text: String) -> [String] {
    guard let mark = text.firstIndex(of: "?") else {
      return KnownFormat.all.map { $0.name + ":" }
    }
    guard let format = KnownFormat.named(String(text[..<mark])) else { return [] }
    let start = text.index(after: text.lastIndex(of: "&") ?? mark)
    let before = text[..<start]
    guard let equals = text[start...].firstIndex(of: "=") else {
      return format.options.map { "\(before)\($0.name)=" }
    }
    let values: [String] =
      switch text[start..<equals] {
      case "transport": Transport.allCases.map(\.rawValue)
      case "create": ["yes", "no"]
      case "force": ["yes"]
      case "base-format": KnownFormat.all.map(\.name)
      default: []
      }
    return values.map { "\(text[...equals])\($0):" }
  }
}
