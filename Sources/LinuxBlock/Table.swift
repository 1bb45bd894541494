// SPDX-License-Identifier: Apache-2.0
// Tables of the device-mapper as typed values. What a value can say wrongly (a chunk that is
// no power of two, a gap between lines) is found by `validate`, before the kernel sees it.
//
// Source: the kernel's Documentation/admin-guide/device-mapper; docs/dm-userspace.md.

/// A table: what lies where on a mapped device. Always valid.
package struct Table: Sendable, Equatable, CustomStringConvertible {
  /// The lines, in order and without gaps.
  package let segments: [Segment]

  /// A table from its lines. Throws: what is wrong with the first bad one, by its number.
  package init(_ segments: [Segment]) throws(TableError) {
    var next: UInt64 = 0
    for (index, segment) in segments.enumerated() {
      try segment.validate(line: index + 1, expecting: next)
      next = segment.start + segment.length
    }
    guard next > 0 else { throw TableError(line: 1, field: "START", "the table is empty") }
    self.segments = segments
  }

  /// A table of one line from sector 0.
  package init(length: UInt64, _ mapping: Mapping) throws(TableError) {
    try self.init([Segment(start: 0, length: length, mapping)])
  }

  /// Length in sectors of the device.
  package var length: UInt64 { segments.reduce(0) { $0 + $1.length } }

  /// The text that dmsetup takes, one line a segment.
  package var description: String {
    segments.map { "\($0)" }.joined(separator: "\n")
  }
}

/// One line of a table. Units: sectors of 512 bytes.
package struct Segment: Sendable, Equatable, CustomStringConvertible {
  /// The first sector on the mapped device.
  package var start: UInt64
  /// How many sectors.
  package var length: UInt64
  /// What is there.
  package var mapping: Mapping

  /// A line from its parts.
  package init(start: UInt64, length: UInt64, _ mapping: Mapping) {
    self.start = start
    self.length = length
    self.mapping = mapping
  }

  /// The line as dmsetup takes it.
  package var description: String {
    let parameters = mapping.parameters
    return "\(start) \(length) \(mapping.target)" + (parameters.isEmpty ? "" : " " + parameters)
  }
}

/// What a line maps to.
package enum Mapping: Sendable, Equatable {
  /// A run of another device.
  case linear(Location)
  /// Every request fails.
  case error
  /// Reads are zeroes, writes go nowhere.
  case zero
  /// Chunks of so many sectors, in turn on each of the devices.
  case striped(chunk: UInt32, [Location])
  /// The same data on several devices.
  case mirror(Mirror)
  /// A copy of an origin, whose differences are kept apart.
  case snapshot(Snapshot)
  /// A run of another device, later.
  case delay(Delay)
  /// A run of another device that fails now and then.
  case flakey(Flakey)
  /// Decided by a worker.
  case userspace(Userspace)
}

/// Where on which device.
package struct Location: Sendable, Hashable {
  /// The device.
  package var device: DeviceReference
  /// The sector there.
  package var offset: UInt64

  /// A location from its parts.
  package init(_ device: DeviceReference, offset: UInt64 = 0) {
    self.device = device
    self.offset = offset
  }
}

/// A block device by its numbers.
package struct DeviceNumber: Sendable, Hashable, CustomStringConvertible {
  /// The driver.
  package var major: UInt32
  /// Which of its devices.
  package var minor: UInt32

  /// A number from its parts.
  package init(major: UInt32, minor: UInt32) {
    self.major = major
    self.minor = minor
  }

  /// MAJOR:MINOR.
  package var description: String { "\(major):\(minor)" }
}

/// A device as a table names it.
package enum DeviceReference: Sendable, Hashable, CustomStringConvertible {
  /// By a path from the root.
  case path(String)
  /// By its numbers, as the kernel says it.
  case number(DeviceNumber)

  /// The path or MAJOR:MINOR.
  package var description: String {
    switch self {
    case .path(let path): path
    case .number(let number): "\(number)"
    }
  }
}

/// The parameters of a mirror.
package struct Mirror: Sendable, Equatable {
  /// Where the mirror keeps in mind which regions are alike.
  package enum Log: Sendable, Equatable {
    /// In memory.
    case core
    /// On a device.
    case disk(DeviceReference)
  }

  /// The log.
  package var log: Log
  /// Sectors of a region: a power of two.
  package var region: UInt32
  /// Whether all are alike at the start; nil: the log knows, or they are not.
  package var inSync: Bool?
  /// The devices, 2 to 9.
  package var legs: [Location]
  /// Whether a device that fails is left out.
  package var handlesErrors: Bool
  /// Whether the log stays when its device fails.
  package var keepsLog: Bool

  /// A mirror from its parts.
  package init(
    log: Log, region: UInt32, inSync: Bool? = nil, legs: [Location],
    handlesErrors: Bool = false, keepsLog: Bool = false
  ) {
    self.log = log
    self.region = region
    self.inSync = inSync
    self.legs = legs
    self.handlesErrors = handlesErrors
    self.keepsLog = keepsLog
  }
}

/// The parameters of a snapshot.
package struct Snapshot: Sendable, Equatable {
  /// How the differences are kept.
  package enum Persistence: String, Sendable, CaseIterable {
    /// They survive a restart.
    case persistent = "P"
    /// The same, and a full store is told rather than made an error.
    case persistentOverflow = "PO"
    /// They do not.
    case transient = "N"
  }
  /// What else it may do.
  package enum Feature: String, Sendable, CaseIterable {
    /// A discard of a chunk zeroes it.
    case discardZeroesStore = "discard_zeroes_cow"
    /// A discard goes on to the origin.
    case discardPassdownOrigin = "discard_passdown_origin"
  }

  /// What is copied.
  package var origin: DeviceReference
  /// Where the differences are.
  package var store: DeviceReference
  /// How they are kept.
  package var persistence: Persistence
  /// Sectors of a chunk, a power of two; 0: what the store says.
  package var chunk: UInt32
  /// What else it may do.
  package var features: [Feature]

  /// A snapshot from its parts.
  package init(
    origin: DeviceReference, store: DeviceReference, persistence: Persistence, chunk: UInt32,
    features: [Feature] = []
  ) {
    self.origin = origin
    self.store = store
    self.persistence = persistence
    self.chunk = chunk
    self.features = features
  }
}

/// The parameters of a delayed device.
package struct Delay: Sendable, Equatable {
  /// Where requests go, and how much later.
  package struct Way: Sendable, Equatable {
    /// Where.
    package var location: Location
    /// How much later.
    package var milliseconds: UInt32

    /// A way from its parts.
    package init(_ location: Location, milliseconds: UInt32) {
      self.location = location
      self.milliseconds = milliseconds
    }
  }

  /// Reads, and what the others do not say.
  package var reads: Way
  /// Writes, if they go another way.
  package var writes: Way?
  /// Flushes, if they go another way than writes.
  package var flushes: Way?

  /// A delay from its parts.
  package init(reads: Way, writes: Way? = nil, flushes: Way? = nil) {
    self.reads = reads
    self.writes = writes
    self.flushes = flushes
  }
}

/// The parameters of a device that fails for some seconds after each so many.
package struct Flakey: Sendable, Equatable {
  /// Where requests go.
  package var location: Location
  /// For how many seconds it works.
  package var up: UInt32
  /// For how many seconds it fails. Not both are 0.
  package var down: UInt32
  /// Whether only writes and flushes fail.
  package var onlyWrites: Bool

  /// A flakey device from its parts.
  package init(_ location: Location, up: UInt32, down: UInt32, onlyWrites: Bool = false) {
    self.location = location
    self.up = up
    self.down = down
    self.onlyWrites = onlyWrites
  }
}

/// The parameters of a device that a worker serves. Source: docs/dm-userspace.md.
package struct Userspace: Sendable, Equatable {
  /// A backing device.
  package struct Device: Sendable, Equatable {
    /// The device.
    package var device: DeviceReference
    /// Whether it is opened for reading only.
    package var readOnly: Bool

    /// A backing device from its parts.
    package init(_ device: DeviceReference, readOnly: Bool = false) {
      self.device = device
      self.readOnly = readOnly
    }
  }

  /// The node: /dev/dmu/NAME.
  package var name: String
  /// Sectors of a block: a power of two.
  package var blockSectors: UInt32
  /// The backing devices by number, 1 to 15.
  package var devices: [Device]
  /// After how many seconds an unanswered question fails; 0: never.
  package var faultTimeout: UInt32

  /// A device from its parts.
  package init(
    name: String, blockSectors: UInt32, devices: [Device], faultTimeout: UInt32 = 0
  ) {
    self.name = name
    self.blockSectors = blockSectors
    self.devices = devices
    self.faultTimeout = faultTimeout
  }
}
